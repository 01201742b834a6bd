import subprocess
import sys

BLOCKED = """
import importlib, pkgutil, sys
for name in ("ray", "mlflow", "pydantic", "plotly", "typer"):
    sys.modules[name] = None
import amt_ray.core
for module in pkgutil.walk_packages(amt_ray.core.__path__, "amt_ray.core."):
    importlib.import_module(module.name)
print(sum(name.startswith("amt_ray.core.") for name in sys.modules))
"""


def test_core__imports_without_ray_mlflow_and_pydantic():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
