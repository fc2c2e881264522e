"""The type checker that the import hook of conftest.py applies to every function and record of the packages."""

from beartype import BeartypeConf, beartype

# is_pep484_tower: an int is a float, as for every other Python type checker.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
