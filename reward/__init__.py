"""cabochon.reward: reward models, scalar and generative."""
if __name__ != "cabochon.reward":
    raise ImportError(f"import cabochon.reward, not {__name__} (the repo root is on sys.path)")
