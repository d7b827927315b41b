"""Defaults that the libraries themselves cannot build, as the least change that mends them."""

from __future__ import annotations

from collections.abc import Mapping

AMENDED: Mapping[str, Mapping[str, object]] = {}
