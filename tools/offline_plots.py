"""Make the pages of `dvc plots show` and `dvc plots diff` work offline.

    python -m tools.offline_plots

By default they load Vega from the network. This writes a page template that contains Vega, from the
package vl-convert-python, and sets it in .dvc/config.local, which git does not track.
"""

import subprocess
from pathlib import Path

from anomaly_detection.errors import UserError
from stages import run, write_text

TEMPLATE = Path(".dvc/plots/offline.html")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Plots</title>
{refresh_tag}
<script>(() => { %s })();</script>
<style>body { font-family: system-ui, sans-serif; } table { border-spacing: 15px; }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    """Write the template and configure DVC to use it."""
    try:
        import vl_convert
    except ImportError:
        raise UserError(
            "vl-convert-python must be installed, but is not; run pip install -e '.[plots]'."
        ) from None
    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # the stub lacks the default
    write_text(TEMPLATE, PAGE % vega.replace("</script", "<\\/script"))
    name = TEMPLATE.relative_to(".dvc").as_posix()
    subprocess.run(["dvc", "config", "--local", "plots.html_template", name], check=True)


if __name__ == "__main__":
    run(main)
