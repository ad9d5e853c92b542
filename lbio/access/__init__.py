"""Who may do what: keys, credentials for servers, the rules for web pages."""
