"""The conformance kit: what every adapter type, backend and format must keep, as checks that anyone can run.

With pytest, derive from a class and say what it is about; without it, call the function of the same name:

    class TestGate(AdapterConformance):
        config = Gate()

    print(check_adapter("gate"))

What a map says of a model is proven by running it: `prove(model, {"text": lambda: model(ids).logits})`.
"""

from adapterkit.testing.adapters import AdapterConformance, check_adapter
from adapterkit.testing.backends import BackendConformance, Sample, check_backend
from adapterkit.testing.formats import FormatConformance, check_format
from adapterkit.testing.proof import Proof, ProofError, Verdict, prove
from adapterkit.testing.reports import CheckReport, CheckResult

__all__ = [
    "AdapterConformance",
    "BackendConformance",
    "CheckReport",
    "CheckResult",
    "FormatConformance",
    "Proof",
    "ProofError",
    "Sample",
    "Verdict",
    "check_adapter",
    "check_backend",
    "check_format",
    "prove",
]
