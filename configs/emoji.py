"""The quickstart's models on emoji: open vocabulary, with held-out concepts and a held-out art style.

  pip install 'jaxvlm[emoji]'      # draws the SVG images; `npm` fetches them
  python -m jaxvlm.main --config configs/emoji.py --workdir runs/emoji

6,211 pictures of 1,349 concepts in five art styles. The test asks for the name and the group of concepts and drawings that were
never trained on, and yes/no questions with balanced answers. Naming an open vocabulary takes far more steps than eight
colours do: expect groups well above chance and few exact names after these minutes.
"""

import runpy
from pathlib import Path

from jaxvlm.config_files import complete

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))


def get_config(arg=None):
    config = QUICKSTART["quickstart"]()
    data = "asset:emoji"
    align, instruct = config["stages"]
    for stage, file in ((align, "align"), (instruct, "instruct")):
        stage["data"]["sources"] = [dict(name="emoji", path=f"{data}/{file}.json", images=f"{data}/images")]
    align["steps"], instruct["steps"] = 200, 300
    del instruct["watch"]
    config |= dict(
        name="emoji",
        description="EfficientNet-Lite0 + linear connector + SmolLM2-135M on emoji of five art styles, in two stages.",
        expected="about 20 minutes on two idle CPU cores, after 15 MB more of downloads from npm",
    )
    config["eval"] |= dict(path=f"{data}/test.jsonl", images=f"{data}/images", limits=EVALUATED, max_new_tokens=12)
    return complete(config)


EVALUATED = [("group of a new concept", 200), ("name in a new style", 100), ("yes/no in a new style", 100)]
