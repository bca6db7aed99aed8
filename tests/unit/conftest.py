"""Quick compilation for all tests of this folder."""

from toys import quick_compile as quick_compile
