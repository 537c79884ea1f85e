package command

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"posthouse/appliance/admin"
	"posthouse/appliance/clientca"
	"posthouse/appliance/demo"
	"posthouse/appliance/demo/outside"
)

func (a *app) demo() *cobra.Command {
	c := &cobra.Command{Use: "demo", Short: "A whole mesh on this machine, with people and an outside world",
		Long: `Runs a mesh of several offices on this machine, a process each, on addresses of a
free 127.0.k.0/24 and unprivileged ports, with people, an alias, a group and a
small outside world (a mail server and a DNS server).`}
	o := demo.Options{Out: a.Out}
	var detach bool
	up := &cobra.Command{Use: "up", Short: "Start a demo; Ctrl-C ends it and leaves nothing behind", Example: "  posthouse demo up\n  posthouse demo up --dir /tmp/d --detach",
		Args: usage(cobra.NoArgs), RunE: func(c *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			o.Exe = exe
			if o.Dir == "" {
				if detach {
					return &ExitError{exUsage, fmt.Errorf("--detach needs --dir: you will want to find the demo again")}
				}
				if o.Dir, err = os.MkdirTemp("", "posthouse-demo-"); err != nil {
					return &ExitError{exCantCreate, fmt.Errorf("make demo folder: %w", err)}
				}
				defer os.RemoveAll(o.Dir)
			}
			began := time.Now()
			fmt.Fprintln(a.Err, "Starting the offices…")
			_, loadErr := demo.Load(o.Dir)
			s, err := demo.Up(c.Context(), o)
			if err != nil {
				return err
			}
			if loadErr != nil { // a new one
				if err := demo.FirstMail(o.Dir); err != nil {
					demo.Down(o.Dir)
					return err
				}
			}
			a.tour(s, o.Dir, time.Since(began))
			if detach {
				return nil
			}
			fmt.Fprintln(a.Out, "\nCtrl-C ends the demo.")
			<-c.Context().Done()
			fmt.Fprintln(a.Err, "\nStopping…")
			return demo.Down(o.Dir)
		}}
	up.Flags().StringVar(&o.Dir, "dir", "", "folder of the demo (default: a new one that is removed at the end)")
	up.Flags().StringSliceVar(&o.Offices, "offices", []string{"hq", "plzen", "praha"}, "names of the offices; the first founds the mesh")
	up.Flags().StringVar(&o.Domain, "domain", "company.test", "the mail domain")
	up.Flags().IntVar(&o.Users, "users", 3, "people an office")
	up.Flags().StringVar(&o.Net, "net", "", "loopback network such as 127.0.5.0/24 (default: the first free one)")
	up.Flags().BoolVar(&detach, "detach", false, "return when the mesh is ready, and let it run")

	var dir string
	in := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&dir, "dir", "", "folder of the demo")
		c.Args = required(c.Args, "dir")
		return c
	}
	var from, to, via, subject string
	send := in(&cobra.Command{Use: "send", Short: "Send one message", Args: usage(cobra.NoArgs), Example: "  posthouse demo send --dir /tmp/d --from anna@company.test --to david@company.test",
		RunE: func(*cobra.Command, []string) error { return demo.Send(dir, from, to, via, subject) }})
	send.Flags().StringVar(&from, "from", "", "sender: a person of the demo, or anybody outside")
	send.Flags().StringVar(&to, "to", "", "recipient")
	send.Flags().StringVar(&via, "via", "", "office to hand it to (default: the sender's home)")
	send.Flags().StringVar(&subject, "subject", "", "subject")
	send.Args = required(send.Args, "from", "to")
	c.AddCommand(up, send,
		in(&cobra.Command{Use: "down", Short: "End a demo; its data stays for the next up", Args: usage(cobra.NoArgs), RunE: func(*cobra.Command, []string) error { return demo.Down(dir) }}),
		in(&cobra.Command{Use: "kill OFFICE", Short: "End an office as a power cut would", Args: usage(cobra.ExactArgs(1)), RunE: func(_ *cobra.Command, args []string) error { return demo.Kill(dir, args[0]) }}),
		in(&cobra.Command{Use: "start OFFICE", Short: "Start an office again", Args: usage(cobra.ExactArgs(1)), RunE: func(c *cobra.Command, args []string) error {
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			return demo.Start(c.Context(), dir, exe, args[0])
		}}),
		&cobra.Command{Use: "outside CONFIG", Hidden: true, Args: usage(cobra.ExactArgs(1)), RunE: func(c *cobra.Command, args []string) error {
			b, err := os.ReadFile(args[0])
			if err != nil {
				return fmt.Errorf("read outside world: %w", err)
			}
			var cfg outside.Config
			if err := json.Unmarshal(b, &cfg); err != nil {
				return fmt.Errorf("read outside world %s: %w", args[0], err)
			}
			cert, err := clientca.SelfSigned(cfg.Host, time.Now(), rand.Reader)
			if err != nil {
				return err
			}
			return outside.Run(c.Context(), cfg, cert)
		}})
	for _, sub := range c.Commands() {
		run := sub.RunE
		sub.RunE = func(c *cobra.Command, args []string) error { return demoError(dir, run(c, args)) }
	}
	return c
}

// demoError gives an error of a demo its exit code.
func demoError(dir string, err error) error {
	var exit *ExitError
	var answered *admin.Error
	switch {
	case err == nil || errors.As(err, &exit) || errors.As(err, &answered):
		return err
	case dir != "":
		if _, e := demo.Load(dir); e != nil {
			return &ExitError{exNoInput, err}
		}
	}
	return &ExitError{exUnavailable, err}
}

// tour prints what a person can do with the demo.
func (a *app) tour(s *demo.State, dir string, took time.Duration) {
	p := s.Nodes[0].Ports
	fmt.Fprintf(a.Out, "The mesh of %s is up after %.1f s.\n\n", s.Domain, took.Seconds())
	a.print(nil, "OFFICE ADDRESS STATUS-PAGE LOG", func(add func(...any)) {
		for _, n := range s.Nodes {
			add(n.Name, n.Address, fmt.Sprintf("https://%s:%d/", n.Address, n.Ports.HTTPS), n.Log)
		}
	})
	fmt.Fprintf(a.Out, "\nIn every office: SMTP %d, submission %d (STARTTLS) and %d (TLS), IMAP %d (STARTTLS) and %d (TLS), pages %d, mesh %d/udp\nTrust %s\n\n", p.SMTP, p.Submission, p.Submissions, p.IMAP, p.IMAPS, p.HTTPS, p.Mesh, s.CAFile)
	a.print(nil, "PERSON PASSWORD HOME", func(add func(...any)) {
		add(s.Admin.Name, s.Admin.Password, s.Nodes[0].Name+" (admin)")
		for _, u := range s.Users {
			add(u.Address, u.Password, u.Home)
		}
	})
	if len(s.Users) == 0 {
		return
	}
	first, last, killed := s.Users[0], s.Users[len(s.Users)-1], s.Nodes[len(s.Nodes)-1]
	fmt.Fprintf(a.Out, `
The group %s has one of each office; %s is an alias of %s.
Mail to %s leaves for the outside world and lies in %s.

Try:
  bin/posthouse status --socket %s
  bin/posthouse demo send --dir %s --from %s --to %s
  bin/posthouse demo kill --dir %s %s     then send, then
  bin/posthouse demo start --dir %s %s
  curl -k --ssl-reqd -u %s:%s imap://%s:%d/INBOX -X 'FETCH 1:* ENVELOPE'
`, s.Group, s.Alias, first.Address, "anybody@"+s.Outside.Domain, s.Outside.Folder,
		s.Nodes[0].Socket, dir, first.Address, last.Address, dir, killed.Name, dir, killed.Name,
		last.Address, last.Password, killed.Address, killed.Ports.IMAP)
}
