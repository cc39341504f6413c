"""cabochon: RL post-training for sparse Mixture-of-Experts language models. Import the rooms you need from here."""
