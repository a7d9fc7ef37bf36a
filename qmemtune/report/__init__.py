"""Run folders made readable: tables and pictures. Imports no torch."""
