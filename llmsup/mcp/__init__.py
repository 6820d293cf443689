"""The MCP server: what llmsup does, as tools for a program that talks MCP over stdio."""
