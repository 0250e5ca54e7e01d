"""Finds dmpy and the packages that it needs, for the plugin scripts beside this file.

nbdkit's Python is the distribution's; it searches neither the folder of a script nor, unless PATH
leads there first, a virtual environment. So the scripts run this file before they import dmpy. From
a checkout it adds the checkout and its .venv, from an installation the site-packages around it.
"""

import site
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
version = f"python{sys.version_info.major}.{sys.version_info.minor}"
if (here.parent / "__init__.py").exists():  # site-packages/dmpy/plugins
    site.addsitedir(str(here.parents[1]))
else:
    if str(here.parent) not in sys.path:
        sys.path.append(str(here.parent))
    venv = here.parent / ".venv"
    packages = venv / "lib" / version / "site-packages"
    if packages.is_dir():
        site.addsitedir(str(packages))
    elif venv.is_dir():
        made = next((folder.name for folder in (venv / "lib").glob("python3*")), "no Python")
        sys.exit(f"dmpy: {venv} is of {made}, nbdkit runs {version}: remove it, run scripts/setup")
try:
    import dmpy.exports  # noqa: F401
except ImportError as error:
    sys.exit(
        f"dmpy: {error} (nbdkit runs {version}, prefix {sys.prefix}): install dmpy's packages for "
        "the Python that nbdkit runs, with scripts/setup, and keep other Pythons out of PATH"
    )
