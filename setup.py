"""Everything is in pyproject.toml; this file is where a compiled extension will be declared."""

from setuptools import setup

setup()
