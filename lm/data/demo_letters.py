"""Another kind of story, for the demo's adapted model: letters that children write home, made like the demo's stories.

python -m lm.data.demo_letters FOLDER        # train.jsonl and validation.jsonl, always the same
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.data.demo_stories import write_story

SIZES = {"validation": 100, "train": 2_000}  # in the order in which they are drawn
SEED = 7

# Templates as in lm/data/demo_plots.py.
LETTERS = (
    """child
place | sight | act
by the sea | a boat with red sails | found a shell
on the farm | a cow with big eyes | fed the hens
in the woods | a deer next to our tent | made a fire
at the lake | a fish that jumped out of the water | learned to swim
in the mountains | snow on the top of the hill | slid down on a sled

Dear {Mom},

[How are you?|I hope you are well.|I miss you.] I am {place} with {friend}. [We have a lot of fun|It is nice here|I
like it here very much]. Yesterday we saw {sight}! {friend} [laughed|was scared|shouted] and I {smiled}.

{Day} we {act}. {friend} said, "[This is the best day|I never want to go home|Let's do it again]!" [I thought of
you.|I wish you were here.|I will show you when I am home.]

[Love|A big hug|Many kisses], {name}
""",
    """child
gift | use
drum | play it every day
kite | fly it on the hill
blanket | sleep under it every night
book | read it with {friend}
hat | wear it in the snow

Dear {Mom},

Thank you for the {gift}! It is {adj} and [so pretty|just right for me|the best gift of all]. I {use}. {friend} [wants
one too|likes it very much|asked me where it is from].

[I am sorry that I did not write before.|I wanted to write to you at once.] I have a gift for you too. [It is a
secret.|You will see it soon.|I made it with my own hands.]

[Love|A big hug|Many kisses], {name}
""",
    """child
wrong | better
broke your lamp | put the pieces together with glue
lost your hat | look for it every day
let the bird out | put out bread so that it comes back
ate the whole cake | bake a new one with {friend}

Dear {Mom},

[I have to tell you something.|Please do not be angry.|I feel bad today.] I {wrong}. [It was not {friend}, it was
me.|I did not want to do it.|I was playing in the house.] I am [so|very] sorry.

I will {better}. {friend} [helps me|said that you will not be mad|told me to write to you]. [Can you forgive me?|Do
you still love me?|I will not do it again.]

[Love|A big hug|Many kisses], {name}
""",
)


def write_letters(split: str) -> list[str]:
    """The letters of ``train`` or ``validation``: all distinct, none in both."""
    draw, letters, drawn = random.Random(SEED), {}, 0
    for name, size in SIZES.items():
        drawn += size
        while len(letters) < drawn:
            letters[write_story(draw, LETTERS)] = None
        if name == split:
            return list(letters)[drawn - size :]
    raise ValueError(f"split {split!r}: expected one of {', '.join(SIZES)}")


def main(args: Sequence[str] | None = None) -> None:
    """Write both splits into a folder."""
    (folder,) = map(Path, sys.argv[1:] if args is None else args)
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        lines = (json.dumps({"text": letter}) + "\n" for letter in write_letters(split))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
