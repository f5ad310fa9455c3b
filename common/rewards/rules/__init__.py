"""The verifiers that need no model, by the name that a recipe gives."""

from common.rewards.rules.answer import AnswerMatch
from common.rewards.rules.format import TaskFormat, ThinkFormat
from common.rewards.rules.instructions import Instructions
from common.rewards.rules.language import LanguageConsistency
from common.rewards.rules.overlong import Overlong

RULES: dict[str, type] = {
    rule.name: rule for rule in (ThinkFormat, TaskFormat, AnswerMatch, Instructions, Overlong, LanguageConsistency)
}
