"""A judge, as far as it is not about what is judged: what it is asked, how its server is asked, what it said."""
