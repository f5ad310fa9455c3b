"""Models that score: what a judge asks of one, whether it runs behind HTTP or beside the trainer."""
