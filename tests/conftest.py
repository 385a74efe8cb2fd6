import os

os.environ["TQDM_DISABLE"] = "1"  # bars would bury what a failing test prints

from datetime import date
from pathlib import Path

import torch
from hypothesis import settings

# more threads than idle cores wait for one another
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("unicfg", deadline=None, max_examples=50)
settings.load_profile("unicfg")


# The table of make test-slow: what each test says it measured, by record_property("measured", text)


def pytest_addoption(parser):
    parser.addoption(
        "--table", type=Path, help="a Markdown file for the results of the tests that run"
    )


def pytest_configure(config):
    if config.getoption("--table"):
        config.pluginmanager.register(_Table(config.getoption("--table")))


class _Table:
    """Writes the outcome of every test into a Markdown table."""

    def __init__(self, file):
        self.file, self.rows = file, []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.removeprefix("tests/").replace("|", "\\|")
            measured = "; ".join(text for key, text in report.user_properties if key == "measured")
            self.rows.append(
                f"| `{name}` | {report.outcome} | {report.duration:.0f} | {measured} |\n"
            )

    def pytest_terminal_summary(self, terminalreporter):
        cores, memory = os.cpu_count(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        text = (
            f"# Result of `make test-slow`\n\n{date.today()}, torch {torch.__version__}, "
            f"{cores} cores, {memory / 2**30:.0f} GB. What is promised: [reliability](reliability.md).\n\n"
            "| test | result | seconds | measured |\n|---|---|--:|---|\n"
        )
        self.file.write_text(text + "".join(self.rows))
