"""`OLLAMA_LB_COMPILE=1 pip install .` has the decision core compiled by mypyc; pyproject.toml declares all else.

Without the variable nothing is compiled, and neither mypy nor a C compiler is needed.
"""

from __future__ import annotations

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = (
    "admission", "aliases", "attempts", "balancer", "blocks", "broadcast", "compiled", "config", "fleet", "health",
    "ledger", "memory", "parts", "placement", "provision", "race", "records", "requests", "selection", "standing",
    "states", "timers", "witness",
)  # fmt: skip
"""What decides, and what every call passes through.

Events and commands are plain Python: others make and read them. So is what looks into objects by the names of their
fields (snapshots, forks, the log).
"""


class CompileCore(build_ext):
    """Has the modules written in C when they are to be built, and not before: it takes a while."""

    def run(self) -> None:
        """Build."""
        from mypyc.build import mypycify  # noqa: PLC0415  it is there only now

        self.distribution.ext_modules = mypycify(
            [f"lbcore/{name}.py" for name in MODULES],
            opt_level="2",
            debug_level="0",
            multi_file=True,
            group_name="ollama_lb_core",
        )
        self.swig_opts = None  # or it would be read twice
        self.finalize_options()
        super().run()


if os.environ.get("OLLAMA_LB_COMPILE", "") not in {"", "0"}:
    setup(
        setup_requires=["mypy>=2.4"],
        ext_modules=[Extension("lbcore", [])],  # stands for them until they are built
        cmdclass={"build_ext": CompileCore},
    )
else:
    setup()
