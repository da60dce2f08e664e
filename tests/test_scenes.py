"""The world: scenes are true of their prompts, and what is held out stays out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from components.evaluation.geneval import relative_position
from components.scenes.tasks import TASKS, Metadata
from components.scenes.world import Scene, World

DATA = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())["data"]
WORLD = World.from_params(DATA)


def assert_true_of(scene: Scene, metadata: Metadata) -> None:
    wanted = {clause["class"]: clause["count"] for clause in metadata["include"]}
    assert Counter(o.shape for o in scene.objects) == wanted
    for clause in metadata["include"]:
        things = [o for o in scene.objects if o.shape == clause["class"]]
        assert len({o.color for o in things}) == 1
        assert clause.get("color", things[0].color) == things[0].color
        if "position" in clause:
            relation, index = clause["position"]
            other = next(o for o in scene.objects if o.shape == metadata["include"][index]["class"])
            assert relation in relative_position(things[0].box(), other.box())


@pytest.mark.parametrize("task", TASKS)
def test_scenes_are_true_of_any_prompt_and_within_the_picture(task: str) -> None:
    rng = np.random.default_rng(0)
    prompts = WORLD.prompts("seen", task) + WORLD.prompts("held_out", task)
    assert len(prompts) == len(WORLD.all_prompts(task))
    for number in rng.permutation(len(prompts))[:60]:
        aspect = float(rng.choice([1.0, 4 / 3, 3 / 4]))
        scene = WORLD.scene_for(prompts[number], rng, aspect)
        assert_true_of(scene, prompts[number])
        for x1, y1, x2, y2 in scene.boxes(round(150 * aspect), 150):
            assert 0 <= x1 < x2 <= round(150 * aspect) and 0 <= y1 < y2 <= 150


def test_every_training_prompt_has_a_training_scene() -> None:
    rng = np.random.default_rng(1)
    prompts = WORLD.training_prompts()
    for number in rng.permutation(len(prompts))[:150]:
        scene = WORLD.scene_for(prompts[number], rng, training=True)
        assert_true_of(scene, prompts[number])
        assert not WORLD.is_held_out(scene) and not WORLD.is_held_out(scene.metadata)


def test_held_out_set_does_not_depend_on_the_data_seed_and_keeps_its_shares() -> None:
    other = World.from_params(DATA | {"seed": 5})
    assert other.held_out == WORLD.held_out
    shapes, colors = len(WORLD.shapes), len(WORLD.colors)
    share = DATA["held_out"]["color_shape"]
    assert len(WORLD.held_out.color_shape) == round(share * shapes * colors)
    for task in ("two_object", "counting", "colors", "position", "color_attr"):
        assert WORLD.prompts("held_out", task), task
