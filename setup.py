"""Metadata is in setup.cfg. Here: the data folders of the top level travel inside the package."""

from setuptools import find_packages, setup

DATA = {"vlm_local.grammars": "grammars", "vlm_local.checkpoints.tiny": "checkpoints/tiny"}

TEXT = ["py.typed", "*.txt", "*.json", "*.html", "*.js", "*.css", "*.xml", "static/*", "templates/*"]

setup(
    packages=[*find_packages(include=["vlm_local", "vlm_local.*"]), *DATA],
    package_dir=DATA,
    package_data={"": TEXT, **{package: ["*"] for package in DATA}},
)
