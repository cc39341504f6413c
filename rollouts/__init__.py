"""cabochon.rollouts: engines that sample completions from a policy."""
if __name__ != "cabochon.rollouts":
    raise ImportError(f"import cabochon.rollouts, not {__name__} (the repo root is on sys.path)")
