"""Reinforcement: answers with searches, rewarded, and the two ways to learn from that (grpo, ppo)."""
