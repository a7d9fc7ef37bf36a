"""The command line: every verb parses, composes, calls and prints."""
