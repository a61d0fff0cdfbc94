"""Forward passes with torch."""
