// Package command is the command line: it reads words, calls admin.Operations
// on the local node through its control socket, and prints. Every listing has
// --json. Exit codes are those of sysexits.h.
package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"posthouse/appliance/admin"
	"posthouse/appliance/api"
	"posthouse/appliance/config"
)

// Exit codes of sysexits.h that do not come from an admin.Error.
const (
	exOK          = 0
	exUsage       = 64
	exConflict    = 65
	exNoInput     = 66 // a folder or file that was named is not there
	exUnavailable = 69 // the node did not answer
	exSoftware    = 70
	exCantCreate  = 73
	exIOErr       = 74
	exConfig      = 78
)

// ExitError is an error with the exit code that it should end the program with.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }
func (e *ExitError) Unwrap() error { return e.Err }

// Streams are what a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Main runs the command line and returns the exit code.
func Main(ctx context.Context, version string, args []string, s Streams) int {
	root := newRoot(version, s)
	root.SetArgs(args)
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exOK
	}
	fmt.Fprintf(s.Err, "posthouse: %s\n", multiline(err.Error()))
	return exitCode(err)
}

// multiline is printable that keeps line ends.
func multiline(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

func exitCode(err error) int {
	var (
		exit     *ExitError
		answered *admin.Error
		problems *config.Problems
	)
	switch {
	case errors.As(err, &exit):
		return exit.Code
	case errors.As(err, &answered):
		return answered.Kind.Exit()
	case errors.As(err, &problems):
		return exConfig
	case errors.Is(err, api.ErrNoAnswer):
		return exUnavailable
	case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission):
		return exIOErr
	}
	return exSoftware
}

// app is what all commands share.
type app struct {
	Streams
	version string
	socket  string
	config  string
	json    bool
}

func newRoot(version string, s Streams) *cobra.Command {
	a := &app{Streams: s, version: version}
	root := &cobra.Command{
		Use:   "posthouse",
		Short: "One mail domain over several offices",
		Long: `Posthouse is a mail appliance for a company with several offices. Every office
runs one node; together they carry one mail domain.

A new node:      posthouse serve, then posthouse init (the first) or posthouse join
Try it at once:  posthouse demo up
What is wrong:   posthouse status

The commands talk to the node on this machine through its control socket: the
one named by --socket, else by POSTHOUSE_SOCKET, else by the configuration.
Every listing prints JSON with --json.

Exit codes are those of sysexits.h:
   0  done                                 70  an error in this program
  64  the command line is wrong            73  a file cannot be made
  65  it exists, or is in another state    74  a file cannot be read or written
  66  no such folder or file               75  not now: try again later
  67  no such user, node or message        77  not allowed
  69  the node does not answer             78  the configuration is wrong
   1  store verify found damage`,
		Example: `  posthouse status
  posthouse help user add`,
		SilenceUsage: true, SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &ExitError{exUsage, fmt.Errorf("%w; see %s --help", err, c.CommandPath())}
	})
	root.PersistentFlags().StringVar(&a.socket, "socket", "", "the node's control socket (default from the configuration)")
	root.PersistentFlags().StringVarP(&a.config, "config", "c", "/etc/posthouse/posthouse.toml", "the node's configuration")
	root.AddCommand(a.serve(), a.init(), a.join(), a.status(), a.members(), a.user(), a.group(), a.alias(), a.queue(), a.mesh(), a.store(), a.demo(),
		&cobra.Command{Use: "version", Short: "Print the version", Args: usage(cobra.NoArgs), Run: func(*cobra.Command, []string) {
			fmt.Fprintln(a.Out, a.version)
		}})
	fill(root)
	return root
}

// usage wraps cobra's argument checks so that their errors say what is wanted
// and exit with 64.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return &ExitError{exUsage, fmt.Errorf("the command is: %s\nMore about it: %s --help", strings.TrimSuffix(c.UseLine(), " [flags]"), c.CommandPath())}
		}
		return nil
	}
}

// required is usage for a command that cannot do without these flags.
func required(check cobra.PositionalArgs, flags ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		for _, f := range flags {
			if !c.Flags().Changed(f) {
				return &ExitError{exUsage, fmt.Errorf("--%s is needed: %s\nMore about it: %s --help", f, c.Flags().Lookup(f).Usage, c.CommandPath())}
			}
		}
		return check(c, args)
	}
}

// unknownCommand says what could have been meant.
func unknownCommand(c *cobra.Command, word string) error {
	text := fmt.Sprintf("%s knows no command %q", c.CommandPath(), word)
	c.SuggestionsMinimumDistance = 2
	if near := c.SuggestionsFor(word); len(near) > 0 {
		text += fmt.Sprintf("; did you mean %q?", near[0])
	}
	return &ExitError{exUsage, fmt.Errorf("%s\nThe commands: %s --help", text, c.CommandPath())}
}

// load reads the configuration.
func (a *app) load() (*config.Config, error) {
	cfg, err := config.Load(a.config)
	if errors.Is(err, os.ErrNotExist) {
		return nil, &ExitError{exConfig, fmt.Errorf("there is no configuration %s; name another with --config, or write one that says at least: name = \"plzen\"", a.config)}
	}
	return cfg, err
}

// node returns the API of the local node.
func (a *app) node() (*api.Client, error) {
	socket := a.socket
	if socket == "" {
		socket = os.Getenv("POSTHOUSE_SOCKET")
	}
	if socket == "" {
		cfg, err := config.Load(a.config)
		switch {
		case errors.Is(err, os.ErrNotExist):
			cfg, _ = config.Parse("")
		case err != nil:
			return nil, err
		}
		socket = cfg.ControlSocket
	}
	return api.Local(socket), nil
}

// on is a command that does something on the local node.
func (a *app) on(f func(c *cobra.Command, n admin.Operations, args []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		n, err := a.node()
		if err != nil {
			return err
		}
		return f(c, n, args)
	}
}

// listing adds --json to a command that lists.
func (a *app) listing(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return c
}

// print writes v as JSON, or rows as a table.
func (a *app) print(v any, head string, rows func(add func(cells ...any))) error {
	if a.json {
		e := json.NewEncoder(a.Out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	var table [][]string
	table = append(table, strings.Fields(head))
	rows(func(cells ...any) {
		row := make([]string, len(cells))
		for i, c := range cells {
			row[i] = printable(fmt.Sprint(c))
		}
		table = append(table, row)
	})
	width := make([]int, len(table[0]))
	for _, r := range table {
		for i, c := range r {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	for _, r := range table {
		var b strings.Builder
		for i, c := range r {
			b.WriteString(c)
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-len([]rune(c))+2))
			}
		}
		fmt.Fprintln(a.Out, strings.TrimRight(b.String(), " "))
	}
	return nil
}

// printable keeps foreign text from moving the cursor or hiding what follows.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 32 || r >= 127 && r < 160 || r >= 0x202A && r <= 0x202E || r >= 0x2066 && r <= 0x2069 || r == 0x2028 || r == 0x2029 {
			return '?'
		}
		return r
	}, s)
}

// secret asks for a password unless it was given; on a pipe it is one line.
func (a *app) secret(prompt string) (string, error) {
	fmt.Fprint(a.Err, prompt)
	defer fmt.Fprintln(a.Err)
	restore := hideTyping(a.In)
	defer restore()
	var line []byte
	b := make([]byte, 1)
	for len(line) < 4096 {
		n, err := a.In.Read(b)
		if n == 1 && b[0] == '\n' || err != nil && len(line) > 0 {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		if err != nil {
			return "", &ExitError{exUsage, fmt.Errorf("read password: %w", err)}
		}
		line = append(line, b[:n]...)
	}
	return "", &ExitError{exUsage, errors.New("the password is too long")}
}
