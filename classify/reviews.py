"""The embedded corpus of the demo: synthetic film reviews, written by a seeded grammar and by no viewer.

They are made so that counting words is not enough. Praise is often given by denying a fault ("never dull"),
blame by denying a virtue ("anything but gripping"); rumours are quoted to be contradicted; most reviews
have mixed feelings; and the verdict, which alone makes the label, uses the same words for both outcomes.
Trained on 2,000 of them, logistic regression reaches 0.75 on single words and 0.90 on pairs of words, a small BERT
more than 0.95 in one epoch. They say nothing about real reviews.
"""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SIZES = {"train": 6000, "validation": 1000, "test": 1000}

KINDS = (
    "thriller", "comedy", "western", "romance", "road movie", "war film", "musical", "family film", "space opera",
    "courtroom drama", "ghost story", "heist film", "biopic", "documentary", "detective story", "costume drama",
)  # fmt: skip
OPENINGS = (
    "My sister and I saw this {kind} on a rainy {day}.",
    "I watched this {kind} with {company} last {day}.",
    "We had tickets for another film, but it was sold out, so this {kind} it was.",
    "This {kind} was shown at our local cinema on {day}.",
    "A colleague lent me this {kind} and asked what I thought of it.",
    "I came to this {kind} without having read a word about it.",
    "This is the third {kind} I have seen this month.",
    "The poster promised a {kind}, and a {kind} is what we got.",
    "It was {day} evening, and {company} had picked a {kind}.",
    "I had missed this {kind} at the time and caught up with it on {day}.",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COMPANY = ("my brother", "two friends", "my parents", "the whole family", "my flatmate", "some neighbours", "my wife")

# What is judged, with its verb: each adjective goes with each of them.
ASPECTS = (
    ("the plot", "was"), ("the dialogue", "was"), ("the acting", "was"), ("the first half", "was"),
    ("the second half", "was"), ("the ending", "was"), ("the music", "was"), ("the camera work", "was"),
    ("the lead", "was"), ("the villain", "was"), ("the direction", "was"), ("the opening scene", "was"),
    ("the supporting cast", "was"), ("the editing", "was"), ("the chase scenes", "were"), ("the jokes", "were"),
    ("the flashbacks", "were"), ("the performances", "were"), ("the quiet scenes", "were"), ("the songs", "were"),
)  # fmt: skip
ADJECTIVES = (
    ("dull", "clumsy", "predictable", "lifeless", "tedious", "unconvincing", "forgettable", "weak", "lazy",
     "awkward", "flat", "disappointing", "tiresome", "shallow"),
    ("gripping", "clever", "moving", "charming", "brilliant", "convincing", "memorable", "strong", "inspired",
     "elegant", "fresh", "delightful", "beautiful", "touching"),
)  # fmt: skip
DEGREES = ("", "", "quite ", "really ", "rather ", "truly ", "simply ")

# {same} is an adjective of the opinion that the sentence expresses, {other} one of the opposite opinion.
OPINIONS = (
    "{Aspect} {was} {degree}{same}.",
    "{Aspect} {was} {degree}{same} and, to me at least, {same2}.",
    "{Aspect} {was} never {other}.",
    "{Aspect} {was} anything but {other}.",
    "{Aspect} {was} far from {other}.",
    "I would not call {aspect} {other}; {same} is more like it.",
    "I had read that {aspect} {was} {other}, and I could not disagree more.",
    "Some will tell you that {aspect} {was} {other}, but they are wrong.",
    "There was nothing {other} about {aspect}.",
    "Nobody can claim that {aspect} {was} {other}.",
    "I kept waiting for {aspect} to turn {other}, which did not happen once.",
)
CONCESSIONS = (
    "Although {aspect} {was} {other}, {aspect2} {was2} {degree}{same}.",
    "{Aspect} {was} {other}, I admit; still, {aspect2} {was2} {same}.",
    "While {aspect} {was} not exactly {same}, {aspect2} {was2} never {other}.",
    "True, {aspect} {was} {other}, but {aspect2} {was2} far from {other2}.",
)
FILLERS = (
    "It runs for about {minutes} minutes.",
    "Most of it takes place in {place}.",
    "The story begins in {place} and ends in {place2}.",
    "I believe the director had made {number} films before.",
    "About {number} people were in the room.",
)
PLACES = ("a small harbour town", "Chicago", "the desert", "a boarding school", "Lisbon", "a lighthouse", "Berlin",
          "a mining village", "the suburbs", "an old hotel", "Kyoto", "a research station")  # fmt: skip
NUMBERS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "a dozen", "twenty")

# Verdicts, negative and positive: the outcomes share their words, and order, negation or contrast decide. {good} and
# {bad} are adjectives of either side.
VERDICTS = (
    (
        "All in all it was more {bad} than {good}.",
        "I expected something {good} and got something {bad}.",
        "What begins as something {good} ends as something {bad}.",
        "I left the cinema thinking how {bad} it was, not how {good}.",
        "My friends found it {good}; I found it {bad}.",
        "It wants to be {good}, and it is {bad}.",
        "The {good} moments can't make up for the {bad} ones.",
        "I wanted to like it, and by the end I could not.",
        "My friends stayed and loved it; I left early and did not regret it.",
        "I can't say that it was worth the ticket.",
        "For a while it had me; then it lost me for good.",
        "It could have been a good film, and it is not.",
    ),
    (
        "All in all it was more {good} than {bad}.",
        "I expected something {bad} and got something {good}.",
        "What begins as something {bad} ends as something {good}.",
        "I left the cinema thinking how {good} it was, not how {bad}.",
        "My friends found it {bad}; I found it {good}.",
        "It sounds {bad}, and it is {good}.",
        "The {bad} moments can't spoil the {good} ones.",
        "I wanted to dislike it, and by the end I could not.",
        "My friends left early; I stayed, loved it and did not regret it.",
        "I can't say that it was not worth the ticket.",
        "For a while it lost me; then it had me for good.",
        "It could have been a bad film, and it is not.",
    ),
)


def write_review(rng: random.Random, label: int) -> str:
    """One synthetic review; label 0 is negative, 1 positive."""
    aspects = rng.sample(ASPECTS, 10)

    def opinion(template: str, liked: int) -> str:
        (aspect, was), (aspect2, was2) = aspects.pop(), aspects.pop()
        same, same2 = rng.sample(ADJECTIVES[liked], 2)
        other, other2 = rng.sample(ADJECTIVES[1 - liked], 2)
        return template.format(
            aspect=aspect, Aspect=aspect.capitalize(), was=was, aspect2=aspect2, was2=was2,
            same=same, same2=same2, other=other, other2=other2, degree=rng.choice(DEGREES),
        )  # fmt: skip

    body = []
    for template in rng.sample(OPINIONS, rng.randint(1, 2)):  # three in four agree with the verdict
        body.append(opinion(template, label if rng.random() < 0.75 else 1 - label))
    if rng.random() < 0.4:
        body.append(opinion(rng.choice(CONCESSIONS), rng.randint(0, 1)))
    if rng.random() < 0.2:
        place, place2 = rng.sample(PLACES, 2)
        filler = rng.choice(FILLERS)
        body.append(filler.format(minutes=rng.randint(80, 160), number=rng.choice(NUMBERS), place=place, place2=place2))
    rng.shuffle(body)
    opening = rng.choice(OPENINGS).format(kind=rng.choice(KINDS), day=rng.choice(DAYS), company=rng.choice(COMPANY))
    bad, good = map(rng.choice, ADJECTIVES)
    return " ".join([opening, *body, rng.choice(VERDICTS[label]).format(good=good, bad=bad)])


def synthetic_reviews(split: str) -> "Dataset":
    """A split of the synthetic corpus: columns text and label (0 negative, 1 positive), half of each."""
    from datasets import ClassLabel, Dataset, Features, Value

    rng = random.Random(f"synthetic reviews {split}")
    labels = [i % 2 for i in range(SIZES[split])]
    rows = {"text": [write_review(rng, label) for label in labels], "label": labels}
    return Dataset.from_dict(rows, Features(text=Value("string"), label=ClassLabel(names=["negative", "positive"])))
