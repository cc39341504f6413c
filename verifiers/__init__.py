"""cabochon.verifiers: scores for text that can be checked; imports neither jax, flax nor ray."""
if __name__ != "cabochon.verifiers":
    raise ImportError(f"import cabochon.verifiers, not {__name__} (the repo root is on sys.path)")
