"""Refusals of our own, for malicious requests that bring none: short, and all beginning as a forced refusal does."""

from model.config import RefusalConfig
from training.shards import digest

REASONS = (
    "It could hurt someone, and I don't want to be part of that.",
    "What you describe would cause real harm to other people.",
    "I won't give advice that puts anyone in danger.",
    "Someone could get hurt, so I have to leave it there.",
    "This would do damage that cannot be undone.",
    "It would be wrong of me to assist with something that harms others.",
    "I'd rather not write anything that could be used against people.",
    "It is against the law, and others would suffer from it.",
    "The risk to other people is too great.",
    "I don't write texts that demean or threaten anyone.",
    "If you are going through a hard time, please talk to someone you trust.",
    "If there is a safe question behind this, I am glad to answer that one.",
    "I can talk about how to stay safe instead, if you like.",
    "Please think about the people who would be affected by it.",
    "That holds however the question is asked.",
    "I have to stop here, whatever has been said before.",
)
"""What follows the opening. Some speak of the text before them, for refusals in the middle of an answer."""


def refusal_of(*key: str) -> str:
    """Return one of the refusals; the same key always gives the same one."""
    return f"{RefusalConfig().prefix} {REASONS[int(digest(*key)[:8], 16) % len(REASONS)]}"
