"""What the ops cost, one file an op: operations, least bytes that a call moves, and what kernels allocate inside.

Functions of plain sizes serve the plan and the benchmarks alike. The table COSTS of a file has the `Cost` of each of
the op's registered operations by name; `plan.costs` joins the tables.

Matrix products count two operations per multiply and add; element-wise work counts as bytes only. Routed rows are
assumed to be spread evenly, so that M_e of E experts see N M_e / E of N rows.
"""
