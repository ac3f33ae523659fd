"""Versions of packages, for a result."""

from importlib.metadata import PackageNotFoundError, version

STACK = ("torch", "megatron-core", "transformer-engine", "mamba-ssm")


def versions(packages: tuple[str, ...] = STACK) -> dict[str, str]:
    """Version of each package, or that it is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
