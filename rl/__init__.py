"""cabochon.rl: policy optimisation and the loop that joins the rooms."""
if __name__ != "cabochon.rl":
    raise ImportError(f"import cabochon.rl, not {__name__} (the repo root is on sys.path)")
