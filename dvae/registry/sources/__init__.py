"""Sources, one per file. base.py has the abstract class and the registry."""
