package command

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"posthouse/appliance/admin"
)

func (a *app) user() *cobra.Command {
	c := &cobra.Command{Use: "user", Short: "People with mailboxes", Long: "Lists, makes, changes and removes users. What is done on one node holds on all."}
	c.AddCommand(a.listing(&cobra.Command{Use: "list", Short: "List users", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		us, err := n.Users(c.Context())
		if err != nil {
			return err
		}
		return a.print(us, "ADDRESS NAME HOME ADMIN FULL ALIASES", func(add func(...any)) {
			for _, u := range us {
				add(u.Address, u.Name, u.Home, mark(u.Admin), mark(u.Full), strings.Join(u.Aliases, ","))
			}
		})
	})}))
	var (
		name, home, password string
		isAdmin              bool
	)
	flags := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&name, "name", "", "display name, such as \"Anna Nováková\"")
		c.Flags().StringVar(&home, "home", "", "node where the mailbox lives (default: this one)")
		c.Flags().StringVar(&password, "password", "", "password; asked for when absent and seen in the process list when given, so prefer to be asked")
		c.Flags().BoolVar(&isAdmin, "admin", false, "may change the mesh")
		return c
	}
	change := func(c *cobra.Command, address string) admin.UserChange {
		r := admin.UserChange{Address: address}
		if c.Flags().Changed("name") {
			r.Name = &name
		}
		if c.Flags().Changed("home") {
			r.Home = &home
		}
		if c.Flags().Changed("password") {
			r.Password = &password
		}
		if c.Flags().Changed("admin") {
			r.Admin = &isAdmin
		}
		return r
	}
	c.AddCommand(flags(&cobra.Command{Use: "add ADDRESS", Short: "Make a user", Example: "  posthouse user add anna@company.com --name 'Anna Nováková' --home plzen",
		Args: usage(cobra.ExactArgs(1)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			r := change(c, args[0])
			if r.Password == nil {
				p, err := a.secret("Password for " + args[0] + ": ")
				if err != nil {
					return err
				}
				r.Password = &p
			}
			u, err := n.CreateUser(c.Context(), r)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s has a mailbox at %s.\n", u.Address, u.Home)
			return nil
		})}))
	c.AddCommand(flags(&cobra.Command{Use: "set ADDRESS", Short: "Change a user's name, password, role or home", Args: usage(cobra.ExactArgs(1)),
		RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			u, err := n.ChangeUser(c.Context(), change(c, args[0]))
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s is changed.\n", u.Address)
			return nil
		})}))
	c.AddCommand(&cobra.Command{Use: "passwd ADDRESS", Short: "Set a user's password, asked for or one line on standard input", Args: usage(cobra.ExactArgs(1)),
		RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			p, err := a.secret("New password for " + args[0] + ": ")
			if err != nil {
				return err
			}
			if _, err := n.ChangeUser(c.Context(), admin.UserChange{Address: args[0], Password: &p}); err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s has a new password.\n", args[0])
			return nil
		})})
	c.AddCommand(a.remove("ADDRESS", "Remove a user; the mail stays on the home node's disk", "%s is removed.\n", func(n admin.Operations) byName { return n.DeleteUser }))
	return c
}

func mark(b bool) string {
	if b {
		return "yes"
	}
	return "-"
}

func (a *app) group() *cobra.Command {
	c := &cobra.Command{Use: "group", Short: "Addresses that stand for several people"}
	c.AddCommand(a.listing(&cobra.Command{Use: "list", Short: "List groups", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		gs, err := n.Groups(c.Context())
		if err != nil {
			return err
		}
		return a.print(gs, "ADDRESS OWNER OUTSIDE MEMBERS", func(add func(...any)) {
			for _, g := range gs {
				add(g.Address, dash(g.Owner), mark(g.Outside), strings.Join(g.Members, ","))
			}
		})
	})}))
	var g admin.Group
	put := &cobra.Command{Use: "put ADDRESS MEMBER...", Short: "Make a group, or replace its members and settings", Example: "  posthouse group put sales@company.com anna@company.com petr@company.com --owner anna@company.com",
		Args: usage(cobra.MinimumNArgs(2)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
			g.Address, g.Members = args[0], args[1:]
			got, err := n.PutGroup(c.Context(), g)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.Out, "%s has %d members.\n", got.Address, len(got.Members))
			return nil
		})}
	put.Flags().StringVar(&g.Name, "name", "", "display name")
	put.Flags().StringVar(&g.Owner, "owner", "", "who hears of mail that could not be delivered")
	put.Flags().BoolVar(&g.Outside, "outside", false, "people outside may write to it")
	c.AddCommand(put, a.remove("ADDRESS", "Remove a group", "%s is removed.\n", func(n admin.Operations) byName { return n.DeleteGroup }))
	return c
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) alias() *cobra.Command {
	c := &cobra.Command{Use: "alias", Short: "Second addresses of users and groups"}
	c.AddCommand(a.listing(&cobra.Command{Use: "list", Short: "List aliases", Args: usage(cobra.NoArgs), RunE: a.on(func(c *cobra.Command, n admin.Operations, _ []string) error {
		as, err := n.Aliases(c.Context())
		if err != nil {
			return err
		}
		return a.print(as, "ADDRESS TARGET", func(add func(...any)) {
			for _, x := range as {
				add(x.Address, x.Target)
			}
		})
	})}))
	c.AddCommand(&cobra.Command{Use: "add ADDRESS TARGET", Short: "Make an alias", Args: usage(cobra.ExactArgs(2)), RunE: a.on(func(c *cobra.Command, n admin.Operations, args []string) error {
		x, err := n.CreateAlias(c.Context(), admin.Alias{Address: args[0], Target: args[1]})
		if err != nil {
			return err
		}
		fmt.Fprintf(a.Out, "Mail to %s goes to %s.\n", x.Address, x.Target)
		return nil
	})}, a.remove("ADDRESS", "Remove an alias", "%s is removed.\n", func(n admin.Operations) byName { return n.DeleteAlias }))
	return c
}
