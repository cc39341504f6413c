"""cabochon.model: the policy, its weights in and out, and upcycling."""

import os

# Products on CPU by Eigen instead of YNNPACK: a third less rounding error in SmolLM2's logits, and no slower
# (docs/log.md). XLA reads its flags with the first program it compiles, and every process that runs the policy comes by
# here before that. A setting of the user's own stays, and so does the name of a file of flags.
_PRODUCTS = "--xla_cpu_experimental_ynn_fusion_type"
_said = os.environ.get("XLA_FLAGS", "").strip()
if _PRODUCTS not in _said and (not _said or _said.startswith("-")):
    os.environ["XLA_FLAGS"] = f"{_said} {_PRODUCTS}=".strip()
