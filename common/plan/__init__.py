"""What a config needs of machines that are not here: targets, and what an engine found for one."""
