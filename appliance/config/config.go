// Package config reads the node's one TOML file: facts of this node alone.
// What concerns the company is domain state, edited by page, command or API.
//
// It does not start anything and reads nothing but the file that it is given.
package config

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Config is one node's file. The zero value of each field means its default.
type Config struct {
	// Name is the node's label in the mesh, such as "plzen": letters, digits
	// and hyphens. Default: the first label of Host.
	Name string `toml:"name"`
	// Host is the node's full host name, such as "plzen.company.com". Default:
	// the machine's.
	Host string `toml:"host"`
	// Data is the folder of everything that the node keeps.
	// Default "/var/lib/posthouse".
	Data string `toml:"data"`
	// ControlSocket is the Unix socket of the command line.
	// Default "/run/posthouse/control.sock".
	ControlSocket string `toml:"control_socket"`
	// LogLevel is "debug", "info", "warn" or "error". Default "info".
	LogLevel string `toml:"log_level"`
	// Join is the master's DNS name or a token "PH1-…"; used until the node is
	// a member, then ignored. Default "": wait for `posthouse init` or `join`.
	Join string `toml:"join"`
	// Advertise lists the addresses, "host:port" or "address:port", where other
	// nodes reach the mesh port. Default: what the master saw us come from.
	Advertise []string `toml:"advertise"`
	// Resolver is a DNS server, "address:port", asked instead of the system's.
	Resolver string `toml:"resolver"`
	// SMTPOutPort is the TCP port of other hosts' mail servers. Default 25.
	SMTPOutPort int `toml:"smtp_out_port"`
	// Trusted lists networks that are not limited in connections: "10.0.0.0/8".
	Trusted []string `toml:"trusted"`
	// TakeBack is how long a node of higher priority must have been back before
	// it leads again. Default "60s".
	TakeBack Duration `toml:"take_back"`

	Listen Listen `toml:"listen"`
	TLS    TLS    `toml:"tls"`
}

// Listen holds the listening addresses. Each is "address:port" or ":port";
// "off" closes a door.
type Listen struct {
	SMTP        string `toml:"smtp"`        // default ":25"
	Submission  string `toml:"submission"`  // default ":587", STARTTLS
	Submissions string `toml:"submissions"` // default ":465", TLS
	IMAP        string `toml:"imap"`        // default ":143", STARTTLS
	IMAPS       string `toml:"imaps"`       // default ":993", TLS
	HTTPS       string `toml:"https"`       // default ":443"
	Mesh        string `toml:"mesh"`        // default ":44337", UDP; cannot be off
}

// TLS names the certificate shown to clients. Default: one issued by the
// mesh's own authority.
type TLS struct {
	Certificate string `toml:"certificate"` // PEM file with the chain
	Key         string `toml:"key"`         // PEM file
}

// Duration is a time.Duration written as "90s" or "5m".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q: want a duration such as \"60s\" or \"5m\"", b)
	}
	*d = Duration(v)
	return nil
}

// Off closes a listening door.
const Off = "off"

// Load reads, completes and validates the file. The error of a file that can be
// read but is wrong is *Problems.
func Load(file string) (*Config, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c, problems := Parse(string(text))
	if len(problems) > 0 {
		return nil, &Problems{File: file, List: problems}
	}
	return c, nil
}

// Parse reads a file's text, fills in the defaults and validates.
func Parse(text string) (*Config, []Problem) {
	var c Config
	problems, ok := Decode(text, &c)
	if !ok {
		return nil, problems
	}
	c.complete()
	for _, p := range c.Validate() {
		p.Line = LineOf(text, p.Key, 0)
		problems = append(problems, p)
	}
	slices.SortStableFunc(problems, func(a, b Problem) int { return a.Line - b.Line })
	return &c, problems
}

// complete fills in the defaults.
func (c *Config) complete() {
	set := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	if c.Host == "" {
		c.Host, _ = os.Hostname()
	}
	if label, _, _ := strings.Cut(c.Host, "."); c.Name == "" {
		c.Name = strings.ToLower(label)
	}
	set(&c.Data, "/var/lib/posthouse")
	set(&c.ControlSocket, "/run/posthouse/control.sock")
	set(&c.LogLevel, "info")
	if c.SMTPOutPort == 0 {
		c.SMTPOutPort = 25
	}
	if c.TakeBack == 0 {
		c.TakeBack = Duration(time.Minute)
	}
	set(&c.Listen.SMTP, ":25")
	set(&c.Listen.Submission, ":587")
	set(&c.Listen.Submissions, ":465")
	set(&c.Listen.IMAP, ":143")
	set(&c.Listen.IMAPS, ":993")
	set(&c.Listen.HTTPS, ":443")
	set(&c.Listen.Mesh, ":44337")
}

// Validate reports everything that is wrong with a complete Config.
func (c *Config) Validate() []Problem {
	var ps []Problem
	bad := func(key, format string, args ...any) {
		ps = append(ps, Problem{Key: key, Text: fmt.Sprintf(format, args...)})
	}
	if !validName(c.Name) {
		bad("name", "%q: want 1 to 63 letters, digits and hyphens, such as \"plzen\"", c.Name)
	}
	if c.Host == "" || strings.ContainsAny(c.Host, " /@:") {
		bad("host", "%q: want the node's full host name, such as \"plzen.company.com\"", c.Host)
	}
	if !filepath.IsAbs(c.Data) {
		bad("data", "%q: want an absolute folder", c.Data)
	}
	if len(c.ControlSocket) > 107 {
		bad("control_socket", "the path has %d bytes; the system allows 107", len(c.ControlSocket))
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		bad("log_level", "%q: want debug, info, warn or error", c.LogLevel)
	}
	if c.SMTPOutPort < 1 || c.SMTPOutPort > 65535 {
		bad("smtp_out_port", "%d: want a port, 1 to 65535", c.SMTPOutPort)
	}
	if c.TakeBack < 0 {
		bad("take_back", "want a positive duration such as \"60s\"")
	}
	if c.Resolver != "" && !validHostPort(c.Resolver) {
		bad("resolver", "%q: want address:port, such as \"192.0.2.53:53\"", c.Resolver)
	}
	for _, a := range c.Advertise {
		if !validHostPort(a) {
			bad("advertise", "%q: want host:port, such as \"plzen.company.com:44337\"", a)
		}
	}
	for _, n := range c.Trusted {
		if _, err := netip.ParsePrefix(n); err != nil {
			bad("trusted", "%q: want a network, such as \"10.0.0.0/8\"", n)
		}
	}
	for _, l := range []struct{ key, addr string }{
		{"listen.smtp", c.Listen.SMTP}, {"listen.submission", c.Listen.Submission}, {"listen.submissions", c.Listen.Submissions},
		{"listen.imap", c.Listen.IMAP}, {"listen.imaps", c.Listen.IMAPS}, {"listen.https", c.Listen.HTTPS}, {"listen.mesh", c.Listen.Mesh},
	} {
		switch {
		case l.addr == Off && l.key == "listen.mesh":
			bad(l.key, "the mesh port cannot be off: without it the node is alone")
		case l.addr == Off:
		case !validListen(l.addr):
			bad(l.key, "%q: want \":port\", \"address:port\" or \"off\"", l.addr)
		}
	}
	if (c.TLS.Certificate == "") != (c.TLS.Key == "") {
		bad("tls.certificate", "certificate and key go together: give both or neither")
	}
	return ps
}

func validName(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
	}) < 0
}

func validHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && host != "" && validPort(port)
}

func validListen(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || !validPort(port) {
		return false
	}
	_, err = netip.ParseAddr(host)
	return host == "" || err == nil
}

func validPort(s string) bool {
	n := 0
	for _, r := range s {
		if r < '0' || r > '9' || n > 65535 {
			return false
		}
		n = n*10 + int(r-'0')
	}
	return n > 0 && n <= 65535
}
