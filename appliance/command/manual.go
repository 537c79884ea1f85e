package command

import (
	"github.com/spf13/cobra"
)

// page is what the manual says of a command beyond its one line.
type page struct{ long, example string }

// manual is the text of the commands by their path. A command that brings its
// own text keeps it.
var manual = map[string]page{
	"posthouse version": {`Prints the version of this program. What the other nodes run stands in:
posthouse members`, `  posthouse version`},

	"posthouse init": {``, `  posthouse init company.com --admin anna
  posthouse init company.com --admin anna --postmaster it@company.com < password.txt`},
	"posthouse join": {``, `  posthouse join mail.company.com
  posthouse join PH1-… --at mail.company.com
  posthouse join mail.company.com --admin anna@company.com
  posthouse join mail.company.com --member`},
	"posthouse serve": {``, `  posthouse serve
  posthouse serve --config /etc/posthouse/posthouse.toml
  systemctl start posthouse        the same, as a service`},
	"posthouse status": {`Prints one sentence about the health of this node and of the mesh as this node
sees it, then what is wrong with its next step, then the nodes. It exits with 0
whenever the node answered, also when something is wrong; scripts read
health.ok of --json.`, `  posthouse status
  posthouse status --json | jq .health
  posthouse status --socket /run/posthouse/control.sock`},
	"posthouse members": {`Lists the nodes of the mesh as this node sees them: state (fresh, joining,
serving, draining, left, unreachable), role (master, voter, member), whether it
is a gateway to the Internet, the round-trip time and the path to it, and how
many recipients' mail waits here for it. In a split each side sees its own side.`, `  posthouse members
  posthouse members --json`},

	"posthouse user": {``, `  posthouse user list
  posthouse user add anna@company.com --name 'Anna Nováková' --home plzen`},
	"posthouse user list": {`Lists everybody with a mailbox in the mesh: address, name, the office where the
mailbox lives, further addresses, and who may change the mesh.`, `  posthouse user list
  posthouse user list --json`},
	"posthouse user add": {`Makes a user with a mailbox at one office. The password is asked for, or read as
one line from standard input. The user can log in as soon as this command has
ended, at any office that has heard of it.`, ``},
	"posthouse user set": {`Changes what is given and leaves the rest. A changed password ends the user's
sessions.`, `  posthouse user set anna@company.com --name 'Anna Dvořáková'
  posthouse user set anna@company.com --admin
  posthouse user set anna@company.com --admin=false`},
	"posthouse user passwd": {`Sets a new password. It is asked for without being shown, or read as one line
from standard input. Sessions that are logged in with the old one end.`, `  posthouse user passwd anna@company.com
  posthouse user passwd anna@company.com < new-password.txt`},
	"posthouse user delete": {`Removes a user. New mail to the address is refused from then on; the mail that
is there stays on the disk of the home office until somebody removes it.`, `  posthouse user delete anna@company.com`},

	"posthouse group": {`A group is an address that stands for several people. People outside may write
to it only if it was made with --outside.`, `  posthouse group list
  posthouse group put sales@company.com anna@company.com petr@company.com`},
	"posthouse group list": {`Lists the groups with their members, who hears of mail that could not be
delivered (owner), and whether people outside may write to them.`, `  posthouse group list
  posthouse group list --json`},
	"posthouse group put": {`Makes a group, or replaces the members and settings of one that exists: what is
not given is gone. Members are addresses of users, groups, or people outside.`, ``},
	"posthouse group delete": {`Removes a group. Its members keep their mailboxes and their mail.`, `  posthouse group delete sales@company.com`},

	"posthouse alias": {`An alias is a second address: mail to it goes to its target. A user may write
as an alias that stands for this user alone.`, `  posthouse alias list
  posthouse alias add info@company.com anna@company.com`},
	"posthouse alias list": {`Lists the aliases with the address that each stands for.`, `  posthouse alias list
  posthouse alias list --json`},
	"posthouse alias add":    {`Makes an alias of a user, a group, or an address outside.`, `  posthouse alias add info@company.com anna@company.com`},
	"posthouse alias delete": {`Removes an alias. Mail to it is refused from then on.`, `  posthouse alias delete info@company.com`},

	"posthouse queue": {`Mail waits on the node that has answered for it: for an office that is cut off,
for a mail server outside that does not answer, or for a person. It leaves by
itself as soon as it can; these commands look at it and meddle with it.`, `  posthouse queue list
  posthouse queue retry --to example.net`},
	"posthouse queue list": {`Lists the messages that wait on this node: for whom, since when, when the next
attempt is due, and the last words of the other side.`, `  posthouse queue list
  posthouse queue list --json`},
	"posthouse queue show": {`Shows one message that waits here: its recipients, the state of each, and what
the other side said last.`, `  posthouse queue show 01hzy3v9k2
  posthouse queue show 01hzy3v9k2 --json`},
	"posthouse queue retry": {`Tries to send now what would be tried later.`, `  posthouse queue retry 01hzy3v9k2
  posthouse queue retry --to example.net
  posthouse queue retry --all`},
	"posthouse queue hold": {`Keeps messages back until they are released. Held mail does not grow too old.`, `  posthouse queue hold 01hzy3v9k2
  posthouse queue hold --to example.net`},
	"posthouse queue release": {`Lets go on what was held. With --from it takes back what a gateway that is lost
for good was to send outside; should that gateway return, it may have sent some
of it already.`, `  posthouse queue release 01hzy3v9k2
  posthouse queue release --all
  posthouse queue release --from plzen`},
	"posthouse queue delete": {`Drops messages for good. Their senders hear nothing. More than one needs --yes.`, `  posthouse queue delete 01hzy3v9k2
  posthouse queue delete --to example.net --yes`},

	"posthouse mesh": {`The mesh is the nodes that carry the domain together. One of them is the master;
it alone changes what all must agree on, and every other node asks it to.`, `  posthouse mesh token create
  posthouse mesh pending
  posthouse mesh transfer praha`},
	"posthouse mesh token": {`A join token lets a node into the mesh. It is good for one node and one day
unless made otherwise, and is shown once.`, `  posthouse mesh token create
  posthouse mesh token list`},
	"posthouse mesh token create": {`Makes a token and prints it: give it to the admin of the new office, who types
it at the new node. It is not shown again. A node that may lead the mesh can open
everybody's password verifiers; one that joins with --member opens only those of
its own people.`, `  posthouse mesh token create
  posthouse mesh token create --member
  posthouse mesh token create --name plzen --hours 2
  posthouse mesh token create --reusable --hours 168`},
	"posthouse mesh token list": {`Lists the tokens and what became of each: open, used (by whom), expired, revoked.`, `  posthouse mesh token list
  posthouse mesh token list --json`},
	"posthouse mesh token revoke": {`Makes a token useless. Nodes that have joined with it stay.`, `  posthouse mesh token revoke 3f2a`},
	"posthouse mesh pending": {`Lists the nodes that ask to be admitted. Compare the code with the one that the
new node shows, then approve or refuse it.`, `  posthouse mesh pending
  posthouse mesh approve 3f2a`},
	"posthouse mesh approve": {`Admits a node that asks. Compare its code first: whoever is admitted gets the
whole domain.`, `  posthouse mesh pending
  posthouse mesh approve 3f2a`},
	"posthouse mesh refuse": {`Turns a node away that asks to be admitted. It may ask again.`, `  posthouse mesh refuse 3f2a`},
	"posthouse mesh node": {`Changes what is given and leaves the rest. A voter may hold the election, and
can open all secrets of the mesh; with --voter=false they are sealed anew
without it. What it has seen it may know: if that worries you, change the
passwords. A gateway has an MX record and sends mail to the Internet. Of the nodes that may
be master, the one with the highest priority leads when it can.

When an office's disk is lost, revoke its node, let the new one join, and give
it the people of the lost one with --replaces: they get empty mailboxes there,
and the mail that the other offices hold for them.`, `  posthouse mesh node praha --gateway
  posthouse mesh node plzen --voter=false
  posthouse mesh node hq --priority 100
  posthouse mesh node plzen --replaces plzen`},
	"posthouse mesh transfer": {`Hands leadership to another node now, such as before maintenance. A node of
higher priority takes it back when it has been there for a while.`, `  posthouse mesh transfer praha`},
	"posthouse mesh revoke": {`Puts a node out of the mesh at once: every other node ends its connections and
hears it no more. Use it for a stolen or a burnt node. To come back it has to
join anew. A thief can work on the password verifiers that the node held: those
of its own people, of everybody if it was a voter. Change these passwords.`, `  posthouse mesh revoke plzen`},
	"posthouse mesh settings": {`Shows the values that hold in the whole mesh, or changes those given: the largest
message and mailbox, the host that takes all mail for outside, the one host name
that clients are told, and who gets mail to postmaster.`, ``},
	"posthouse mesh forked": {`After a promote, lists the changes that the other side had committed and that do
not hold any more, so that somebody can make again what is still wanted.`, `  posthouse mesh forked
  posthouse mesh forked --json`},
	"posthouse mesh promote": {``, `  posthouse mesh promote
  posthouse mesh promote --yes
  posthouse mesh promote --yes --revoke hq`},

	"posthouse store": {`The store is a message log, which is the truth, and an index over it, which can
be made anew at any time. Stop the node first: systemctl stop posthouse`, `  posthouse store verify
  posthouse store rebuild`},
	"posthouse store verify": {``, `  posthouse store verify
  posthouse store verify --data /var/lib/posthouse --json`},
	"posthouse store compact": {``, `  posthouse store compact
  posthouse store compact --data /var/lib/posthouse`},
	"posthouse store rebuild": {``, `  posthouse store rebuild
  posthouse store rebuild --data /var/lib/posthouse`},

	"posthouse demo": {``, `  posthouse demo up
  posthouse demo up --dir /tmp/d --detach
  posthouse demo kill --dir /tmp/d plzen`},
	"posthouse demo up": {`Starts the offices and waits until the mesh is ready, then prints addresses,
people with passwords, and a few lines to try. In a folder that holds a demo it
starts that one again with its data.`, ``},
	"posthouse demo down": {`Ends the demo's processes. The data stays: demo up with the same folder starts
it again.`, `  posthouse demo down --dir /tmp/d`},
	"posthouse demo kill":  {`Ends an office's process by SIGKILL. Nothing starts it again but demo start.`, `  posthouse demo kill --dir /tmp/d plzen`},
	"posthouse demo start": {`Starts an office that was killed, and returns when its ports answer.`, `  posthouse demo start --dir /tmp/d plzen`},
	"posthouse demo send": {`Sends one message as a person of the demo, by submission with the person's
password, or as somebody outside, by port 25.`, ``},
}

// fill gives every command its page of the manual, and makes the ones that only
// hold others refuse words that they do not know.
func fill(c *cobra.Command) {
	p := manual[c.CommandPath()]
	if c.Long == "" {
		c.Long = p.long
	}
	if c.Example == "" {
		c.Example = p.example
	}
	for _, sub := range c.Commands() {
		fill(sub)
	}
	if c.HasSubCommands() && !c.Runnable() {
		c.DisableFlagsInUseLine = true
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			return unknownCommand(c, args[0])
		}
	}
}
