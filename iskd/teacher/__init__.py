"""The frozen original: where it comes from, and what it said about the training windows (`cache`).

Imports: system, plan, models, losses.
"""

from __future__ import annotations

from iskd.teacher.cache import TeacherCache
from iskd.teacher.cache_rows import TeacherCacheSpec, check_terms_cached
from iskd.teacher.load import Loaded, TeacherSpec, load_teacher
from iskd.teacher.states import BatchStates, TeacherStates

__all__ = [
    "BatchStates",
    "Loaded",
    "TeacherCache",
    "TeacherCacheSpec",
    "TeacherSpec",
    "TeacherStates",
    "check_terms_cached",
    "load_teacher",
]
