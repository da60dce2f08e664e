"""The starter: a small trained model that comes with the package; its card is model/README.md."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
WORLD = "world.json"  # of the folder: params.data, which the model was trained on
