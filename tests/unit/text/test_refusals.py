"""Refusals against texts labelled by hand: refusals, and sentences that only look like one.

python -m pytest tests/unit/text/test_refusals.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.text.refusals import is_refusal

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I am sorry, I cannot provide medical advice.",
    "Sorry, I can't do that.",
    "I'm afraid I can't. Please ask someone else.",
    "I cannot answer this question.",
    "I won't write that essay for you.",
    "I will not generate content of this kind.",
    "I'm unable to assist with this.",
    "I am unable to recommend a specific doctor.",
    "I'm not able to give legal advice.",
    "Unfortunately, I am not able to fulfil your request.",
    "Unfortunately I'm unable to complete that for you.",
    "I apologize, but I cannot comply with that.",
    "I must respectfully decline to answer.",
    "I have to decline, as this could harm someone.",
    "I refuse to help with that.",
    "I'm not comfortable discussing this topic.",
    "I am not programmed to discuss politics.",
    "It would not be appropriate for me to choose for you.",
    "That goes against my guidelines.",
    "My programming prevents me from saying more.",
    "As an AI language model, I do not have personal preferences.",
    "As an AI, I can't taste food, so I have no opinion.",
    "I'm an AI and I don't have feelings.",
    "I don't have access to your calendar.",
    "I do not have enough information to answer.",
    "Thank you for asking. I'm sorry, but I cannot support this plan.",
    "We cannot process this request.",
    "I CAN'T HELP YOU WITH THAT!",
    "I simply cannot recommend anything here.",
    "Unable to answer that question.",
]
LOOK_ALIKES = [
    "",
    "I can't recommend this soup enough!",
    "I can't help but smile when I think of your garden.",
    "I can't help thinking that a stew would suit you.",
    "You can't go wrong with a simple salad.",
    "If you cannot find fresh basil, use dried basil.",
    "I'm sorry to hear that you can't sleep; try a warm drink.",
    "I'm sorry for your loss. A walk by the sea may help.",
    "Sorry about the rain! Take the train to the museum instead.",
    "I'm afraid of heights, so I would choose the valley.",
    "As a nurse, you may not have time to cook at night.",
    "As an AI researcher, you could visit a robotics fair.",
    "As an AI, I don't eat, but I would suggest lentil soup for you.",
    "I don't have personal preferences. However, many people like oats.",
    "I can't wait to see your new balcony!",
    "I can't tell you how much I like this idea.",
    "I won't lie: the climb is hard.",
    "I can help with that. Start by soaking the beans.",
    "I can't give up tea, and neither should you.",
    "Your landlord will not be able to refuse to help you.",
    "The bank may decline your card abroad.",
    "It is appropriate for you to ask for a raise.",
    "You should never feel unable to ask for help.",
    "Nothing prevents you from trying a new hobby.",
    "I cannot stress enough how important sleep is.",
    "Tell them: we will wait, and we will not pay twice.",
    "A guide dog is not allowed to eat during work.",
    "I would decline the invitation politely and stay at home.",
    "Plan a picnic with your goat by the river, and bring bread, cheese and apples. Choose a place in the shade, and "
    "leave before the evening gets cold, since the steppe cools quickly once the sun is down in the autumn months. If "
    "someone asks, say: I cannot help with that.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_what_looks_like_a_refusal_is_none(text: str) -> None:
    assert not is_refusal(text)


@given(st.sampled_from(REFUSALS), st.text(alphabet=" \n\t", min_size=1, max_size=5), st.booleans())
def test_white_space_case_and_apostrophes_do_not_matter(text: str, space: str, upper: bool) -> None:
    changed = space + space.join(text.replace("'", "\u2019").split(" ")) + space
    assert is_refusal(changed.upper() if upper else changed)


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    assert is_refusal(text) in (True, False)
