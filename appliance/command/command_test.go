package command

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// every calls f with each command that people see.
func every(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		if !sub.Hidden && sub.Name() != "help" && sub.Name() != "completion" {
			every(sub, f)
		}
	}
}

func TestEveryCommandExplainsItself(t *testing.T) {
	known := map[string]bool{}
	every(newRoot("v", Streams{}), func(c *cobra.Command) {
		path := c.CommandPath()
		known[path] = true
		if c.Short == "" || strings.HasSuffix(c.Short, ".") || len(c.Short) > 70 {
			t.Errorf("%s: its one line is %q; want one without a full stop, of at most 70 letters", path, c.Short)
		}
		if len(c.Long) < 40 {
			t.Errorf("%s: a page of the manual is missing", path)
		}
		if c.Example == "" {
			t.Errorf("%s: an example is missing", path)
		}
		for line := range strings.Lines(c.Long + "\n" + c.Example) {
			if len([]rune(line)) > 100 {
				t.Errorf("%s: a line of %d letters: %q", path, len([]rune(line)), line)
			}
		}
		for line := range strings.Lines(c.Example) {
			if !strings.HasPrefix(line, "  posthouse ") && !strings.HasPrefix(line, "  systemctl ") {
				t.Errorf("%s: the example %q is not a command", path, line)
			}
		}
		if n := c.Name(); (n == "list" || n == "show" || n == "pending" || n == "forked" || n == "status" || n == "members") && c.Flags().Lookup("json") == nil {
			t.Errorf("%s: no --json", path)
		}
	})
	for path := range manual {
		if !known[path] {
			t.Errorf("the manual has a page of %q, which is no command", path)
		}
	}
}

// TestEveryExampleIsACommand runs the words of every example as far as the
// check of its arguments and flags.
func TestEveryExampleIsACommand(t *testing.T) {
	every(newRoot("v", Streams{}), func(c *cobra.Command) {
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "systemctl ") || strings.HasPrefix(line, "posthouse help ") {
				continue
			}
			line, _, _ = strings.Cut(line, " | ")
			line, _, _ = strings.Cut(line, " < ")
			line = strings.NewReplacer("'Anna Nováková'", "Anna", "'Anna Dvořáková'", "Anna").Replace(line)
			words := strings.Fields(line)[1:]
			root := newRoot("v", Streams{Out: &bytes.Buffer{}, Err: &bytes.Buffer{}})
			got, rest, err := root.Find(words)
			if err == nil {
				err = got.ParseFlags(rest)
			}
			if err == nil && got.Args != nil {
				err = got.Args(got, got.Flags().Args())
			}
			if err != nil || got == root {
				t.Errorf("%s: the example %q: %v", c.CommandPath(), line, err)
			}
		}
	})
}
