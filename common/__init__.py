"""The method, written once: data, rollouts, rewards, advantages, losses and the training loop. Imports no engine."""
