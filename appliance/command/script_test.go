package command

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"posthouse/appliance/api"
)

// The scripts in testdata/script are the specification of the command line: a
// node of their own each, the words that a person types, what they answer, and
// the exit code.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"posthouse": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			defer stop()
			os.Exit(Main(ctx, "1.2.3", os.Args[1:], Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
		},
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits, "configure": configure, "await": await, "capture": capture, "mail": mail,
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("NO_COLOR", "1")
			return nil
		},
	})
}

// exits CODE posthouse ARGS... runs a command and wants that exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE command args...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		if got = -1; strings.HasPrefix(err.Error(), "exit status ") {
			fmt.Sscanf(err.Error(), "exit status %d", &got)
		}
	}
	if fmt.Sprint(got) != args[0] {
		ts.Fatalf("exit code %d (%v), want %s", got, err, args[0])
	}
}

// configure NAME writes NAME.toml of a node on a loopback address that is free,
// and points POSTHOUSE_SOCKET at it.
func configure(ts *testscript.TestScript, _ bool, args []string) {
	name := args[0]
	// TCP first: whoever holds these ports of an address is another test's node.
	for a := 0; a < 250; a++ {
		ip := fmt.Sprintf("127.77.%d.%d", os.Getpid()%250+1, 1+(int(time.Now().UnixNano())+a)%250)
		l, err := net.Listen("tcp", ip+":2525")
		if err != nil {
			continue
		}
		l.Close()
		text := fmt.Sprintf(`name = %q
host = "%s.company.test"
data = %q
control_socket = %q

[listen]
smtp = "%[5]s:2525"
submission = "%[5]s:2587"
submissions = "%[5]s:2465"
imap = "%[5]s:2143"
imaps = "%[5]s:2993"
https = "%[5]s:2443"
mesh = "%[5]s:44337"
`, name, name, ts.MkAbs(name), ts.MkAbs(name+".sock"), ip)
		ts.Check(os.WriteFile(ts.MkAbs(name+".toml"), []byte(text), 0o600))
		ts.Setenv("POSTHOUSE_SOCKET", ts.MkAbs(name+".sock"))
		ts.Setenv("ADDRESS", ip)
		return
	}
	ts.Fatalf("no free loopback address")
}

// await NAME STATE [WORD] waits until the node says that it is in that state,
// with that word in its sentence.
func await(ts *testscript.TestScript, _ bool, args []string) {
	c := api.Local(ts.MkAbs(args[0] + ".sock"))
	last := ""
	for range 600 {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		s, err := c.Status(ctx)
		cancel()
		if len(args) > 2 && !strings.Contains(s.Health.Sentence, args[2]) {
			<-time.After(25 * time.Millisecond)
			continue
		}
		if last = fmt.Sprint(s.State, err, s.Health.Sentence); err == nil && s.State == args[1] && (s.State != "serving" || s.Master != "") {
			return
		}
		<-time.After(25 * time.Millisecond)
	}
	ts.Fatalf("%s is not %s: %s", args[0], args[1], last)
}

// capture VAR PATTERN sets VAR to what the group of the pattern matched in the
// last standard output.
func capture(ts *testscript.TestScript, _ bool, args []string) {
	m := regexp.MustCompile(args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if len(m) < 2 {
		ts.Fatalf("no %s in %s", args[1], ts.ReadFile("stdout"))
	}
	ts.Setenv(args[0], m[1])
}

// mail FROM TO hands one message to the node's port 25 and wants a 250.
func mail(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.Dial("tcp", ts.Getenv("ADDRESS")+":2525")
	ts.Check(err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 4096)
	for _, say := range []string{"", "HELO x.example.net", "MAIL FROM:<" + args[0] + ">", "RCPT TO:<" + args[1] + ">", "DATA", "Subject: x\r\n\r\nx\r\n."} {
		if say != "" {
			fmt.Fprintf(c, "%s\r\n", say)
		}
		n, err := c.Read(b)
		ts.Check(err)
		if b[0] != '2' && b[0] != '3' {
			ts.Fatalf("%s: %s", say, b[:n])
		}
	}
}
