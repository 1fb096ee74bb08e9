"""Sources, one file each. base.py has the abstract class and the registry."""
