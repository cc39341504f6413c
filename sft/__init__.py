"""cabochon.sft: supervised fine-tuning, the first stage."""
if __name__ != "cabochon.sft":
    raise ImportError(f"import cabochon.sft, not {__name__} (the repo root is on sys.path)")
