"""What people look at: the table, contact sheets, and one self-contained HTML page."""
