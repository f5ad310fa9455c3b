"""The verifiers of a recipe on responses out of a file: to test reward models, and to judge a run once more."""
