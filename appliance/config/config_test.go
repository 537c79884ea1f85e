package config

import (
	"strings"
	"testing"
)

const good = `name = "plzen"
host = "plzen.company.com"
data = "/var/lib/posthouse"

[listen]
smtp = "127.0.0.1:2525"
https = "off"
`

func TestAGoodFileGetsItsDefaults(t *testing.T) {
	c, problems := Parse(good)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if c.Listen.SMTP != "127.0.0.1:2525" || c.Listen.Mesh != ":44337" || c.SMTPOutPort != 25 || c.Listen.HTTPS != Off {
		t.Errorf("got %+v", c)
	}
}

func TestAWrongFileNamesKeyLineAndSuggestion(t *testing.T) {
	for _, tc := range []struct{ name, add, want string }{
		{"an unknown key", "[tls]\ncertifcate = \"x\"", `x:9: tls.certifcate: no such key; did you mean "tls.certificate"?`},
		{"a key of another table", "[tls]\nimaps = \":1\"", `x:9: tls.imaps: no such key; did you mean "listen.imaps"?`},
		{"a wrong type", "[tls]\nkey = 5", `x:9: tls.key`},
		{"a port beyond the last", "imap = \":70000\"", `x:8: listen.imap: ":70000": want ":port"`},
		{"a number where text is wanted", "[tls]\nkey = 5", `x:9: tls.key: want text in quotes`},
		{"half a certificate", "[tls]\nkey = \"x\"", `certificate and key go together`},
		{"no TOML at all", "what is this", `x:8`},
		{"the mesh port off", "mesh = \"off\"", `x:8: listen.mesh: the mesh port cannot be off`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, list := Parse(good + tc.add)
			if got := (&Problems{File: "x", List: list}).Error(); !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want it to contain %q", got, tc.want)
			}
		})
	}
}

func TestTypesAreToldInPlainWords(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{`name = 5`, `x:1: name: want text in quotes, such as "plzen"`},
		{`smtp_out_port = "25"`, `x:1: smtp_out_port: want a number, without quotes`},
		{`trusted = "10.0.0.0/8"`, `x:1: trusted: want a list, such as ["10.0.0.0/8"]`},
		{`take_back = "soon"`, `x:1: take_back: "soon": want a duration such as "60s" or "5m"`},
		{`take_back = 60`, `x:1: take_back: "60": want a duration such as "60s" or "5m"`},
		{"data = \"/var\nname = \"x\"", `x:1: data: the closing quote is missing`},
		{`listen = "x"`, `x:1: listen: want a table: a line with the name in brackets, such as [listen], and its keys below`},
	} {
		_, list := Parse(tc.text)
		if got := (&Problems{File: "x", List: list}).Error(); got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.text, got, tc.want)
		}
	}
}

func TestAllProblemsAreReportedAtOnce(t *testing.T) {
	_, list := Parse("name = \"Ä\"\nhost = \"a b\"\nlog_level = \"loud\"\nnmae = 1\n")
	if len(list) != 4 {
		t.Errorf("got %d problems: %v", len(list), list)
	}
}
