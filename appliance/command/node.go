package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"posthouse/appliance/admin"
)

type byName = func(context.Context, string) error

// remove is a command "delete NAME" and its like.
func (a *app) remove(arg, short, said string, f func(admin.Operations) byName) *cobra.Command {
	return a.one("delete "+arg, short, said, f)
}

// one is a command on one named thing.
func (a *app) one(use, short, said string, f func(admin.Operations) byName) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: usage(cobra.ExactArgs(1)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
		if err := f(n)(c.Context(), args[0]); err != nil {
			return err
		}
		fmt.Fprintf(a.Out, said, args[0])
		return nil
	})}
}

func (a *app) init() *cobra.Command {
	var r admin.InitRequest
	c := &cobra.Command{Use: "init DOMAIN", Short: "Found a mesh: this node becomes its first master",
		Long: `Founds a mesh that carries DOMAIN. This node becomes its first node, its master
and its gateway to the Internet; the admin becomes the first user. Afterwards,
make a token for each further office with: posthouse mesh token create`,
		Example: "  posthouse init company.com --admin anna", Args: usage(cobra.ExactArgs(1)),
		RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			r.Domain = args[0]
			if r.AdminPassword == "" {
				var err error
				if r.AdminPassword, err = a.secret("Password for " + r.AdminName + "@" + r.Domain + ": "); err != nil {
					return err
				}
			}
			got, err := n.Init(c.Context(), r)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "The mesh of %s is founded. %s is its first admin.\nNext: posthouse mesh token create, and on the next office's node: posthouse join TOKEN\n", got.Domain, got.Admin)
			return nil
		})}
	c.Flags().StringVar(&r.AdminName, "admin", "admin", "local part of the first admin's address")
	c.Flags().StringVar(&r.AdminPassword, "password", "", "the admin's password; asked for when absent")
	c.Flags().StringVar(&r.Postmaster, "postmaster", "", "who gets mail to postmaster@ and abuse@ (default: the admin)")
	c.Flags().StringSliceVar(&r.Networks, "network", nil, "networks whose addresses client certificates may name")
	return c
}

func (a *app) join() *cobra.Command {
	var r admin.JoinRequest
	c := &cobra.Command{Use: "join NAME|TOKEN", Short: "Bring this node into a mesh",
		Long: `Writes the intent to join and follows what happens; the node goes on trying when
this command ends. Three doors:

  posthouse join mail.company.com            then an admin approves the node,
                                             after comparing the code shown
  posthouse join PH1-…                       a token from: posthouse mesh token create
  posthouse join mail.company.com --admin a@company.com
                                             with a mesh admin's password`,
		Args: usage(cobra.ExactArgs(1)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			r.Target = args[0]
			if r.Admin != "" && r.Password == "" {
				var err error
				if r.Password, err = a.secret("Password for " + r.Admin + ": "); err != nil {
					return err
				}
			}
			if err := n.Join(c.Context(), r); err != nil {
				return err
			}
			return a.followJoin(c.Context(), n)
		})}
	c.Flags().BoolVar(&r.Member, "member", false, "never lead, and keep no other office's secrets")
	c.Flags().StringVar(&r.At, "at", "", "with a token: host or host:port where the mesh answers")
	c.Flags().StringVar(&r.Admin, "admin", "", "a mesh admin's address")
	c.Flags().StringVar(&r.Password, "password", "", "the admin's password; asked for when absent")
	return c
}

// followJoin prints each step once, until the node is a member.
func (a *app) followJoin(ctx context.Context, n admin.Operations) error {
	said := map[string]bool{}
	joined := false
	err := n.Watch(ctx, func(s admin.Status) bool {
		for _, line := range s.JoinProgress {
			if !said[line] {
				said[line] = true
				fmt.Fprintln(a.Out, line)
			}
		}
		joined = s.State == "serving"
		return !joined
	})
	if joined {
		return nil
	}
	return err
}

func (a *app) status() *cobra.Command {
	return a.listing(&cobra.Command{Use: "status", Short: "Is mail flowing, and who cannot do what", Args: usage(cobra.NoArgs),
		RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
			s, err := n.Status(c.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(s, "", nil)
			}
			fmt.Fprintf(a.Out, "%s\n\n", s.Health.Sentence)
			fmt.Fprintf(a.Out, "node %s (%s), master %s, term %d\n", s.Node, s.State, dash(s.Master), s.Term)
			if s.StoreBytes > 0 {
				fmt.Fprintf(a.Out, "store %s, of which %s are needed\n", mebibytes(s.StoreBytes), mebibytes(s.StoreLive))
			}
			for _, x := range s.Conditions {
				fmt.Fprintf(a.Out, "%s %s since %s: %s %s\n", x.Level, x.Name, x.Since.Format(time.RFC3339), x.Text, x.Next)
			}
			for _, l := range s.JoinProgress {
				fmt.Fprintln(a.Out, l)
			}
			fmt.Fprintln(a.Out)
			return a.memberTable(s)
		})})
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (a *app) members() *cobra.Command {
	return a.listing(&cobra.Command{Use: "members", Short: "The nodes of the mesh as this one sees them", Args: usage(cobra.NoArgs),
		RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
			s, err := n.Status(c.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(s.Members, "", nil)
			}
			return a.memberTable(s)
		})})
}

func (a *app) memberTable(s admin.Status) error {
	return a.print(nil, "NODE STATE ROLE GATEWAY RTT PATH QUEUE OLDEST VERSION", func(add func(...any)) {
		for _, m := range s.Members {
			rtt, oldest := "-", "-"
			if m.Path != "self" && m.Path != "none" {
				rtt = fmt.Sprintf("%.1fms", m.RTT)
			}
			if m.Queue > 0 {
				oldest = (time.Duration(m.Oldest) * time.Second).String()
			}
			add(m.Name, m.State, m.Role, mark(m.Gateway), rtt, m.Path, m.Queue, oldest, dash(m.Version))
		}
	})
}

func (a *app) queue() *cobra.Command {
	c := &cobra.Command{Use: "queue", Short: "Mail that waits on this node"}
	c.AddCommand(a.listing(&cobra.Command{Use: "list", Short: "List what waits", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		es, err := n.Queue(c.Context())
		if err != nil {
			return err
		}
		return a.print(es, "ID FOR FROM RECIPIENTS SINCE NEXT SAID", func(add func(...any)) {
			for _, e := range es {
				next, said := "when reached", "-"
				if e.Next != nil {
					next = e.Next.Format(time.RFC3339)
				}
				if e.Held != "" {
					next = "held: " + e.Held
				}
				for _, r := range e.Recipients {
					if r.Said != "" {
						said = r.Said
					}
				}
				add(e.ID, e.Destination, "<"+e.From+">", len(e.Recipients), e.Accepted.Format(time.RFC3339), next, said)
			}
		})
	})}))
	c.AddCommand(a.listing(&cobra.Command{Use: "show ID", Short: "Show one message with its recipients", Args: usage(cobra.ExactArgs(1)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
		es, err := n.Queue(c.Context())
		if err != nil {
			return err
		}
		for _, e := range es {
			if e.ID != args[0] {
				continue
			}
			if !a.json {
				fmt.Fprintf(a.Out, "message %s from <%s>, %d bytes, accepted %s, %d attempts, for %s\n", e.ID, e.From, e.Size, e.Accepted.Format(time.RFC3339), e.Attempts, e.Destination)
			}
			return a.print(e, "RECIPIENT STATE SAID", func(add func(...any)) {
				for _, r := range e.Recipients {
					add(r.Address, r.State, dash(r.Said))
				}
			})
		}
		return admin.Errorf(admin.NotFound, "queue.unknown", "No message %s waits here.", args[0])
	})}))
	for _, x := range []struct {
		use, short, said string
		sure             bool
		f                func(admin.Operations) func(context.Context, admin.QueueAction) (int, error)
	}{
		{"retry", "Try now", "%d to be tried now.\n", false, func(n admin.Operations) func(context.Context, admin.QueueAction) (int, error) { return n.QueueRetry }},
		{"hold", "Keep until released", "%d held.\n", false, func(n admin.Operations) func(context.Context, admin.QueueAction) (int, error) { return n.QueueHold }},
		{"release", "Let what is held go on", "%d released.\n", false, func(n admin.Operations) func(context.Context, admin.QueueAction) (int, error) { return n.QueueRelease }},
		{"delete", "Drop for good, without a report to the sender", "%d deleted.\n", true, func(n admin.Operations) func(context.Context, admin.QueueAction) (int, error) { return n.QueueDelete }},
	} {
		c.AddCommand(a.queueAction(x.use, x.short, x.said, x.sure, x.f))
	}
	return c
}

func (a *app) queueAction(use, short, said string, ask bool, f func(admin.Operations) func(context.Context, admin.QueueAction) (int, error)) *cobra.Command {
	var act admin.QueueAction
	var sure bool
	c := &cobra.Command{Use: use + " [ID]", Short: short, Args: usage(cobra.MaximumNArgs(1)), RunE: func(c *cobra.Command, args []string) error {
		if len(args) == 1 {
			act.ID = args[0]
		}
		if act.ID == "" && act.Destination == "" && act.From == "" && !act.All {
			return &ExitError{exUsage, fmt.Errorf("which? give an ID, --to DESTINATION or --all")}
		}
		if ask && act.ID == "" && !sure {
			return &ExitError{exUsage, fmt.Errorf("this drops several messages for good; add --yes to do it")}
		}
		n, err := a.node()
		if err != nil {
			return err
		}
		k, err := f(n)(c.Context(), act)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.Out, said, k)
		return nil
	}}
	c.Flags().StringVar(&act.Destination, "to", "", "all that wait for this destination, as listed under FOR")
	c.Flags().BoolVar(&act.All, "all", false, "all that wait here")
	if use == "release" {
		c.Flags().StringVar(&act.From, "from", "", "take back what a lost node was to send outside; should it return, it may have sent some of it already")
	}
	if ask {
		c.Flags().BoolVar(&sure, "yes", false, "do not ask")
	}
	return c
}

func (a *app) mesh() *cobra.Command {
	c := &cobra.Command{Use: "mesh", Short: "Nodes, tokens, and who is master"}
	token := &cobra.Command{Use: "token", Short: "Join tokens"}
	var tr admin.TokenRequest
	create := a.listing(&cobra.Command{Use: "create", Short: "Make a token that lets one node join", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		t, err := n.CreateToken(c.Context(), tr)
		if err != nil {
			return err
		}
		if a.json {
			return a.print(t, "", nil)
		}
		fmt.Fprintln(a.Out, t.Secret)
		return nil
	})})
	create.Flags().BoolVar(&tr.Reusable, "reusable", false, "several nodes may use it")
	create.Flags().IntVar(&tr.Hours, "hours", 24, "how long it is good")
	create.Flags().StringVar(&tr.Name, "name", "", "only for the node of this name")
	create.Flags().BoolVar(&tr.Member, "member", false, "the node may not lead, and keeps no other office's secrets")
	token.AddCommand(create, a.one("revoke ID", "Make a token useless", "%s is revoked.\n", func(n admin.Operations) byName { return n.RevokeToken }),
		a.listing(&cobra.Command{Use: "list", Short: "List tokens", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
			ts, err := n.Tokens(c.Context())
			if err != nil {
				return err
			}
			return a.print(ts, "ID STATE REUSABLE EXPIRES USED-BY", func(add func(...any)) {
				for _, t := range ts {
					add(t.ID, t.State, mark(t.Reusable), t.Expires.Format(time.RFC3339), dash(t.UsedBy))
				}
			})
		})}))
	pending := a.listing(&cobra.Command{Use: "pending", Short: "Nodes that ask to be admitted", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		ps, err := n.PendingNodes(c.Context())
		if err != nil {
			return err
		}
		return a.print(ps, "ID NAME HOST FROM CODE SINCE STATE NOTE", func(add func(...any)) {
			for _, p := range ps {
				add(p.ID, p.Name, p.Host, p.From, p.Code, p.Since.Format(time.RFC3339), p.State, dash(p.Clash))
			}
		})
	})})
	forked := a.listing(&cobra.Command{Use: "forked", Short: "Changes that were lost when a lineage ended", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		fs, err := n.Forked(c.Context())
		if err != nil {
			return err
		}
		return a.print(fs, "INDEX TIME ACTOR WHAT", func(add func(...any)) {
			for _, f := range fs {
				add(f.Index, f.Time.Format(time.RFC3339), f.Actor, f.What)
			}
		})
	})})
	c.AddCommand(token, pending, forked, a.promote(), a.nodeSwitches(), a.settings(),
		a.one("approve ID", "Admit a pending node after comparing its code", "%s is admitted.\n", func(n admin.Operations) byName { return n.Approve }),
		a.one("refuse ID", "Turn a pending node away", "%s is refused.\n", func(n admin.Operations) byName { return n.Refuse }),
		a.one("transfer NODE", "Hand leadership over", "%s leads now.\n", func(n admin.Operations) byName { return n.Transfer }),
		a.one("revoke NODE", "Put a node out of the mesh at once", "%s is out of the mesh.\n", func(n admin.Operations) byName { return n.RevokeNode }))
	return c
}

func (a *app) nodeSwitches() *cobra.Command {
	var (
		voter, gateway bool
		priority       int
		replaces       string
	)
	c := &cobra.Command{Use: "node NAME", Short: "Change a node's switches, or let it replace a lost one", Args: usage(cobra.ExactArgs(1)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
		r := admin.NodeChange{Name: args[0], Replaces: replaces}
		if c.Flags().Changed("voter") {
			r.Voter = &voter
		}
		if c.Flags().Changed("gateway") {
			r.Gateway = &gateway
		}
		if c.Flags().Changed("priority") {
			r.Priority = &priority
		}
		if r.Voter == nil && r.Gateway == nil && r.Priority == nil && replaces == "" {
			return &ExitError{exUsage, errors.New("nothing to change; give --voter, --gateway, --priority or --replaces\nMore about it: posthouse mesh node --help")}
		}
		if err := n.ChangeNode(c.Context(), r); err != nil {
			return err
		}
		fmt.Fprintf(a.Out, "%s is changed.\n", args[0])
		return nil
	})}
	c.Flags().BoolVar(&voter, "voter", true, "may hold the election")
	c.Flags().BoolVar(&gateway, "gateway", false, "has an MX record and sends to the Internet")
	c.Flags().IntVar(&priority, "priority", 0, "the highest leads when it can")
	c.Flags().StringVar(&replaces, "replaces", "", "a node that was revoked, perhaps of the same name: its people get empty mailboxes here")
	return c
}

func (a *app) promote() *cobra.Command {
	var r admin.PromoteRequest
	c := &cobra.Command{Use: "promote", Short: "Take over by hand when most nodes are lost for good",
		Long: `Makes this node the master of a new lineage, with the domain state as it stands
here. Use it only when the others will not come back soon: what they have
committed since this node heard of them last does not count any more. When they
do come back they follow, and the page lists what they had committed.

Without --yes it only says what may be lost.`,
		Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
			got, err := n.Promote(c.Context(), r)
			if err != nil {
				return err
			}
			if got.Done {
				fmt.Fprintf(a.Out, "This node leads generation %d, term %d.\n", got.Generation, got.Term)
				return nil
			}
			fmt.Fprintf(a.Out, "%s\nTo do it: posthouse mesh promote --yes\n", strings.Join(got.MayLose, "\n"))
			return nil
		})}
	c.Flags().BoolVar(&r.Confirm, "yes", false, "do it")
	c.Flags().StringSliceVar(&r.Revoke, "revoke", nil, "nodes to put out of the mesh, such as stolen ones")
	c.Flags().StringSliceVar(&r.Forget, "forget", nil, "nodes that will not come back, such as burnt ones")
	return c
}
