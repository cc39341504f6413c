"""The checker jaxtyping puts on every function of the package while tests run: beartype, with int accepted for float.

PEP 484 says so and mypy does so; beartype alone would refuse `timeout=5` for a float.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
