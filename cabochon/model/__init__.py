"""cabochon.model: the policy, its weights in and out, and upcycling."""
