"""What people look at: tables, charts and the page that holds them."""
