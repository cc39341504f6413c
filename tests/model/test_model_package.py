"""What importing cabochon.model does to a process."""

import os
import subprocess
import sys

import pytest

OURS = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize(
    ("said", "then"),
    [
        (None, OURS),
        ("", OURS),
        (" --xla_backend_optimization_level=0 ", f"--xla_backend_optimization_level=0 {OURS}"),
        ("--xla_backend_optimization_level=0", f"--xla_backend_optimization_level=0 {OURS}"),
        (f"{OURS}LIBRARY_FUSION_TYPE_DOT", f"{OURS}LIBRARY_FUSION_TYPE_DOT"),
        ("/a/file/of/flags", "/a/file/of/flags"),
    ],
)
def test_xla_multiplies_by_eigen_unless_told_otherwise(said, then):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | ({} if said is None else {"XLA_FLAGS": said})
    code = "import os, sys, cabochon.model; assert 'jax' not in sys.modules; print(os.environ['XLA_FLAGS'])"
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == then


def test_xla_hears_it():
    """What XLA compiles says who multiplies."""
    code = """
import os, sys
if sys.argv[1] == "ynn": os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
import cabochon.model, jax, jax.numpy as jnp
x = jax.random.normal(jax.random.key(0), (64, 4096))
print(jax.jit(lambda x: x @ x.T).lower(x).compile().as_text())
"""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    text = {}
    for who in ("ours", "ynn"):
        out = subprocess.run([sys.executable, "-c", code, who], env=env, check=True, capture_output=True, text=True)
        text[who] = out.stdout
    assert "__ynn_fusion" in text["ynn"]
    assert "__ynn_fusion" not in text["ours"]
